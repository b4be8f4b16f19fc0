"""The MiniStack emulator, with changes for this project; `__main__` starts it, on the emulator's own Python.

Each module says how the emulator differs from AWS there, and changes it. Differences that remain are listed in
docs/security.md.
"""
