"""What does a model say of a client, and how is that bounded?

`leak` rebuilds what it can from a client's messages; `mechanism` clips, adds noise and whitens; `accounting` counts the
privacy that rounds spend; `noisy_sum` puts them between server and clients as a channel.
"""
