"""Loss spikes: detection, and what is done about them."""
