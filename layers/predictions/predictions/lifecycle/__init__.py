"""The life of a prediction, one module per step of the protocol."""
