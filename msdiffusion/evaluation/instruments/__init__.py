"""Small networks that look at pictures of the world."""
