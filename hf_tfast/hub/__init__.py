"""What leaves the machine: model cards, pushes to the Hub, and the code that goes with a model."""
