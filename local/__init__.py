"""What runs on a developer's machine: the local cloud, the demonstration, the stand-in for Replicate."""
