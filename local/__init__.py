"""Tools for a developer's machine: the local cloud, the demonstration, the stand-in for Replicate."""
