"""What runs say of photos of one's own."""
