"""Keys and values on their way between engines, and between a device and the host."""
