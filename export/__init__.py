"""Deployment: what is made from the zoo, and measured of it."""
