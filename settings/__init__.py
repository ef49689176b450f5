"""What a process reads before it is one: its settings, where its model is, whom to trust. Imports nothing of ours."""
