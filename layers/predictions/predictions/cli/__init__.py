"""What the commands of `replicate-serverless` do, by what they are about; `predictions.cli.__main__` lists them."""
