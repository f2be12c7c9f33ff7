"""The bytes that travel, and Flower's messages around them; the same simulated and deployed."""

FRAME_VERSION = 2
"""Version of the frames. Two ends with different ones do not understand each other, and say so at the first hello."""
QUOTED = 80
"""Characters of a stranger's words that are repeated in ours."""
