"""What is asked for, checked without torch."""
