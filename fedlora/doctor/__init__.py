"""What is wrong here, before it goes wrong: the machine, the config, the node's own files."""
