"""What every process reads before it is one: its settings file, and where its model is. Imports nothing of ours."""
