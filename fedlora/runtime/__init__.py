"""Where simulated clients live: this process, Ray actors, Flower's engine; and whole simulations."""
