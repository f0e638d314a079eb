// newer_symbols.cpp: what GCC 9 and later take from the system's libraries, and what those of manylinux_2_28 do not have.
// Compiled with hidden symbols, so that nothing outside the library is bound to these.

#include <new>
#include <sstream>

// Read by std::shared_ptr, which counts without atomic operations where this is not 0 (glibc 2.32).
extern "C" {
char __libc_single_threaded = 0;
}

// The constructors without an argument (libstdc++ 3.4.26); the same with one are older.
extern "C" {
void new_ostringstream(std::ostringstream* self) __asm__(
    "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void new_ostringstream(std::ostringstream* self) { new (self) std::ostringstream(std::ios_base::out); }

void new_stringstream(std::stringstream* self) __asm__(
    "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void new_stringstream(std::stringstream* self) { new (self) std::stringstream(std::ios_base::in | std::ios_base::out); }
}

// Where an array would be too large for its size to be a number (libstdc++ 3.4.29); older ones throw it by other ways.
extern "C" {
[[noreturn]] void throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }
}
