"""The training of found networks to the end, by timm's own parts."""
