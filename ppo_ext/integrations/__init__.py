"""ppo_ext's ops inside other libraries' trainers."""
