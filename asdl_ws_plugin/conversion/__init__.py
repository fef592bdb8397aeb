"""Model surgery: fused and functional weights become linear layers that hooks see, in place and
back.
"""
