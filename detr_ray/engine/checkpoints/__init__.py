"""What a run keeps: its folder and who holds it, its checkpoints, and the state that goes into them and comes back."""
