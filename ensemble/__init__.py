"""From labelled texts to out-of-fold logits, member weights and thresholds."""
