"""What cached decoding keeps of earlier tokens."""
