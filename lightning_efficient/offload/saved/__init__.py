"""What backward needs, and other tensors not in use, in other tiers."""
