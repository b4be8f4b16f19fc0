"""Cost of predictions: price books, what a prediction cost by them, and which prices are missing."""
