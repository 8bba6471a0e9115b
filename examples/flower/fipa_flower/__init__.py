"""An app for Flower: FIPA on the sine task, or on four hospitals."""
