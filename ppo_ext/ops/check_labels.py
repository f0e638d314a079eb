"""Labels outside the vocabulary on CUDA: kernels never read them, and note them where nobody has to wait for it."""

import torch

_NOTES = {}  # device -> int64 [4]: how many such labels, and the row, the id and the V of one of them


def note(device):
    """The tensor in which kernels on this device note such labels; None where they are refused at once or not noted."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return None
    if device not in _NOTES:
        if torch.cuda.is_current_stream_capturing():  # it would be part of the graph
            return None
        _NOTES[device] = torch.zeros(4, dtype=torch.int64, device=device)
    return _NOTES[device]


def check_labels(device=None):
    """Raise if an op met a label outside the vocabulary on a CUDA device since the last call.

    On CUDA such a row becomes NaN and its gradient 0, without a word, as a word would mean to wait for the device. Call
    this where you wait anyway, such as after a training step's statistics were read.

    Args:
        device: the device to ask; None asks all on which an op has run.

    Raises:
        ValueError: there was one; the text names a row, its id and V, and how many there were. The count starts anew.

    Notes:
        Waits for the device. Calls under torch.compile are not noted; `validate=True` checks any call at once.
    """
    for noted in [_NOTES[key] for key in _NOTES if device is None or key == torch.device(device)]:
        count, row, label, vocabulary = noted.tolist()
        if count:
            noted.zero_()
            raise ValueError(
                f"logprobs: labels must be ids in [0, {vocabulary}), got {label} in row {row} of an earlier "
                f"call on {noted.device}; {count} in all since the last check"
            )
