"""The bytes that travel, and Flower's messages around them; the same simulated and deployed."""
