"""Messages of the monitor: monitor.proto, and what protoc made of it."""
