"""What the commands are configured by. Nothing here imports torch."""
