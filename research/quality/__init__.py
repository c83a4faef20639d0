"""What a lossy verifier does to texts that can be scored."""
