"""What makes the networks fast and small, and what measures it."""
