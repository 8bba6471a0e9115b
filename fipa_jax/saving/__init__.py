"""What outlives a process?"""
