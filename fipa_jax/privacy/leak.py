"""What can be rebuilt of a client from its messages?"""
