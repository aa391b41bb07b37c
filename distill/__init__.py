"""From the ensemble's logits to one small student."""
