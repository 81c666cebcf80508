"""What a run stands on: devices, processes, memory, files."""
