"""The adapter: its network, its files, and the condition it makes."""
