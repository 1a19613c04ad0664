"""The objects that scenes are made of: nouns that are one token with a leading space in the Llama tokenizer."""

OBJECTS: tuple[str, ...] = tuple(
    """
    apple ball bag bell boat book boot bread brick bridge bus button camera cap
    card cart chain chair clock coat coffee coin computer crown cup disk doll dress
    drum egg engine fan fig fish flag flower fork frame gift glass guitar
    hat horn iron key keyboard lamp leaf letter lock magnet map mask medal milk mirror
    newspaper note novel paint paper pen phone photo piano picture pie pipe
    plane plant plate pot printer radio ring rock rose screen shell stamp star statue
    stone string sword table tent ticket train watch wheel wire
    """.split()
)
