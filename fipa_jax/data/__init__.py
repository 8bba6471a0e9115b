"""Where do arrays come from, and who owns which example?"""
