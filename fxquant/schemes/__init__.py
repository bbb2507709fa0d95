"""What happens at a site, as frozen dataclasses, as text and as JSON.

Anyone above formats may call this room. It knows number formats by name and passes by spelling
only: no tensor is quantized here, no pass is imported.
"""
