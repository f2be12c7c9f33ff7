"""Keys and certificates of a deployment: made, kept, renewed, and told apart when they fail."""
