"""The files that BIOSCAN-1M was released as: names, sizes, checksums, licences, and the mirrors of each.

Nothing here is guessed: a size or checksum that is not published is None, and a file whose address is not
known has no mirror. Sources: the catalogue entry of Zenodo record 8030065 (sizes to the byte); the package
`bioscan-dataset` (MD5 sums, addresses at Zenodo and Hugging Face, revisions); the Hugging Face page of the
dataset (which files it holds, rounded sizes); the file id list of the paper's program (Google Drive).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final

from bioscan.errors import RequestError, near, unknown


@dataclass(frozen=True, kw_only=True)
class ReleasedFile:
    """One released file and where it lies.

    Attributes:
        name: File name, unique.
        group: Short name of the package that it is a copy, or a part, of.
        size: Bytes, where published to the byte.
        about: Size as published in rounded form, else empty; not used to verify.
        md5: Published checksum, 32 hexadecimal digits.
        licence: As stated where the file is published; None: nothing is stated.
        mirrors: Mirror -> address, the preferred one first.
        page: Where a person may find a file without a mirror.
        parts: First and last of the 113 part folders inside, for archives that hold only some.
    """

    name: str
    group: str
    size: int | None = None
    about: str = ""
    md5: str | None = None
    licence: str | None = None
    mirrors: Mapping[str, str] = field(default_factory=dict)
    page: str = ""
    parts: tuple[int, int] | None = None


MIRRORS: Final = ("zenodo", "huggingface", "drive")
"""In the order in which they are asked: Zenodo keeps files for good and has no quota, Drive has one."""

LICENCE: Final = "CC BY 3.0 (stated since 2025-01-24; CC BY-NC-SA 4.0 before)"

_DATASET_FOLDER: Final = "https://drive.google.com/drive/folders/1kD9cXuQ1FdL30etp7sjy_Gs_NAAJ3EXI"
_CHECKPOINT_FOLDER: Final = "https://drive.google.com/drive/folders/1ft17GpcC_xDhx5lOBhYAEtox0sdZchjA"


def _mirrors(name: str, *, drive: str, at: str = "") -> Mapping[str, str]:
    """Addresses by mirror; `at` names the others besides Drive that are known to hold the file."""
    addresses = {
        "zenodo": f"https://zenodo.org/records/8030065/files/{name}",
        "huggingface": f"https://huggingface.co/datasets/bioscan-ml/BIOSCAN-1M/resolve/33e1f31/{name}",
        "drive": _drive(drive),
    }
    return {m: addresses[m] for m in MIRRORS if m == "drive" or m in at.split()}


def _drive(file_id: str) -> str:
    return f"https://drive.google.com/uc?id={file_id}"


_WHOLE: Final = (
    ReleasedFile(
        name="BIOSCAN_Insect_Dataset_metadata.tsv",
        group="metadata",
        size=1_227_580_325,
        md5="dec3bb23870a35e2e13bc17a5809c901",
        licence=LICENCE,
        mirrors=_mirrors(
            "BIOSCAN_Insect_Dataset_metadata.tsv",
            at="zenodo huggingface",
            drive="1u6E4cL9BP1JRBNmDq0pFeUr6YksKupc8",
        ),
    ),
    ReleasedFile(
        name="BIOSCAN_Insect_Dataset_metadata.jsonld",
        group="metadata",
        about="2.07 GB",
        licence=LICENCE,
        mirrors=_mirrors(
            "BIOSCAN_Insect_Dataset_metadata.jsonld",
            at="huggingface",
            drive="1aVIDOm9uDwo7zciZ-PgqPnLWc48ar5Eg",
        ),
    ),
    ReleasedFile(
        name="cropped_256.zip",
        group="cropped_256",
        size=7_171_212_982,
        md5="fe1175815742db14f7372d505345284a",
        licence=LICENCE,
        mirrors=_mirrors("cropped_256.zip", at="zenodo", drive="1Pnf_ou7TyqgZgQLANzzNpCIl7q4gvXe1"),
    ),
    ReleasedFile(
        name="cropped_256.hdf5",
        group="cropped_256",
        about="7.41 GB",
        licence=LICENCE,
        mirrors=_mirrors("cropped_256.hdf5", at="huggingface", drive="14IknEcycGNoWOsvxGC5tAAClc5G5A-cM"),
    ),
    ReleasedFile(
        name="original_256.zip",
        group="original_256",
        size=26_364_230_180,
        md5="9729fc1c49d84e7f1bfc6f5a0916d72b",
        licence=LICENCE,
        mirrors=_mirrors("original_256.zip", at="zenodo", drive="17JEVWFR8V1mPRopsSSoLqMh1dx1I7yoA"),
    ),
    ReleasedFile(
        name="original_256.hdf5",
        group="original_256",
        about="27.2 GB",
        licence=LICENCE,
        mirrors=_mirrors("original_256.hdf5", at="huggingface", drive="1MoT8Q3QJLHdPig1N5SLTdVP3XuH2_AAY"),
    ),
    ReleasedFile(
        name="CLIBD_partitioning.zip",
        group="clibd",
        md5="fc08444a47d1533d99a892287e174cc1",
        mirrors={
            "huggingface": "https://huggingface.co/datasets/bioscan-ml/clibd/resolve/335f24b/"
            "data/BIOSCAN_1M/CLIBD_partitioning.zip"
        },
    ),
    ReleasedFile(name="BIOSCAN_1M_low_quality_images.xlsx", group="low_quality", page=_DATASET_FOLDER),
    ReleasedFile(
        name="BIOSCAN_Insect_crop_tool_checkpoint.ckpt", group="checkpoints", page=_CHECKPOINT_FOLDER
    ),
)

_PARTS: Final = 113

_CROPPED_FULL: Final = {
    (1, 20): "1TxvAD8-O24kyDe7u_OW7fcp3Yux81hQs",
    (21, 40): "1ZLbJa9pxeHVLZ1YdOVbjY6zpMlPsAnWp",
    (41, 60): "1N0Kw1N8nvt3fIfGGTOMJgqfXfy2Pe3ki",
    (61, 80): "1m9P1TcVBRy9GDKmWYFtdDLDDkvwpz_lX",
    (81, 100): "1qjQMC3Gpw7NoMB1_R2clnPl3VADRBUNR",
    (101, 113): "18zI42boE4y74EcG6do7d8R0IjeKyAsFE",
}
"""Part folders inside -> Drive id. The paper's program asks for 113 archives that do not exist."""

_ORIGINAL_FULL: Final = """
1V_X03TXVdONkcELWCZk3AWN3F_xIMe9Y 1ic9de0uSh4IA8mZwGkinqTFIR537Lr1J 1h5roDMd7cjWcDQficdoupsp5YKgn8jJU
1D5cNPpmSsoWWlPnp06sm6ESj0KpYmRxG 1qsyTCstAK2Bcn6deAYNQmUy9ugur5QYB 1J-8o4LoK3G4qsSAZFXTwMbjebEXj_O9a
15xbaNAoPaSOzjaZLATBdSu7WHHfTZ26W 112JNXpft3APCJfWgAzEf71912FKsgJcX 17yjO81zuO2j4eARCKNzkZdHGZTBPG7Cz
1hAJrw5--r-QbBQ5f_cgNSDW8TqOekcjQ 1zdKX1Ewgfo5PKPmeEOMk5wJOfdBvao40 11u1O8gMqmA5Va-npQz5w1AQ2XpPAvFgn
1IuarbtwIDBXkNjOSPbj0xDnhZZQNzs1G 1xmEFBVravMiyvjaYwXNwbEczFdEjdcmG 164_vfmOYQS3d_NHUCH_PhQP_Voeqh5w-
1l0jE5ZnS7dxVcjXBQNvCbyveug80tN2L 1I6gOWQLJu4S0hmf_nKomdXI-xjLq9pyM 1EuvCGTvSLA0OwDyQol5VgN2CYaOU60Le
1GR-2TZSN5jsoW3swr_yah3V70Srd_b39 1VF-ekK_C4U8CgbnYTm02YPmfrPwyeOU1 1SH5YLO6neRer6TMUVqTrK_bPXbjD2QiS
1PTS2Ylo1X1oVEd4cHtKxkzhhl4_vtitC 1aSM-ExBxI6vR_fnkCdBqG9Xt5mv5x0tF 1AHSgBl_n6xI_7sUODuq2EKRdwZ8K8W9b
1KDf5ryifB5gjFyKdnvbVYpzAqG3o2eMn 1wD_8TuPK77dLj_wF3r59jhDTMVedIVew 1EIZ-olsZ1XOnWf7Fg2WWceCgieciXjv9
1mejVdqC62wHz3kvBbBao6GZy3Li-96Yr 1AfzII88EbWjFFGw1sJPfJZP8L4b2kQAa 1pneaSXBagGEmwwas6IbfO2UNwPtAAbk4
1kAadL2BlVvAkthKtqUB0B-z3hClOuSXa 1nQfgtIOsbD-veW4Mr5xILLuPUs3ESLFZ 1I5jvfrqTsWXnvWFsu6PIbpO4UzfT2t_8
18wYA7tCin2Z84NPBZ6hAO_js8tSbSbSn 1Cf9Dc_S9MSyihOue4y8veHWIKfSzjAnW 1ws5Tr3LfeYGezjDadozrW6hqsuGRfleL
1TlKj7d45sAXgdDrgqNYjDRsSLi6hwoOy 1BS3e6ZbHvZ0raLCBHDOVID2rzLT6iT56 1kCDZmmZVesVB3YOAqKb7dYEIpCOCAkQ5
1F3xS_tPDxNZBBSpyDOu0AS8BnGxlm1IZ 1VsyEMBfGClaWwe8_APfOrrparypqQKJE 14x1DnDL_BbXP6LwDsQRGzC4dPYVyG-9n
1lKvYcg1RWciRWmo5SdHnrgBJJUC_Ykul 1Kn5QPizcs7K4HwGZR8QgkVMVJMG6l7n_ 1va25BDnP8Z8VXJLTeXHEmk32MIHlYr1A
1sUQiqyJaRTHryOHiUC-rOIAsRj0kZr1L 1d1OHHkfUI6fRm8xcN1fAWLtNAWBZK9ff 13HKRuKKwtGEK2zz0s686XLvT1SNO5bnW
1v3z-MFYVMoGx2KZRUXPYcr9t4_VbLrc1 1dkWYWBk9N5M61VGbAZOBQxtocGSjzEX_ 1gCG7sZ2tY_N_8aPOX0LxO4AJUx3va4TL
1Ikan6n_wzfIG83HM0aKWXmL5wpuxtA4w 1CdVoLMGjQBFKHKIr-qLx4f6vJ8rLEjfc 1pFlR3F5-wuO4hs-S8hSxTMmUkymrOpwi
12xUR-U60owv5KBGGg6tcY9WBj6dvU286 1rrze1q86whdnn-HApdzM_BBKFp2LnEpk 1Bhote55O5B9zf-5qE7seeV_Opl-VCYK9
1COfQXs6VQziNIa470BumT2YWGNx97uBq 1lkRO8HDzYrKzQUTJktdS87O5XH9Tw8QK 10JfBPITLHOoQgVMRBHaveLdznXOp2CKs
1OHOMFAkQx2CzkhM21LqMJLe5YKAd9i-g 1a6pVGOCqM0Y3Qgy18Kq6JXsqZ7DcSwqR 1a-OiJVN88PdFhNvFP4H7JRFY_iQ7qQZt
1LWXBBeYae7rHRI2qMci_w0VykeYy1HeT 1iAbGV53vnQBNqKBVUHwIJluuqA0gz-i0 1fCaTMY78thJktgmTRxOGvW5jk5Zmp0bk
1sOyljgFG0eiD4UEfhcXYc9xfUySCqGbC 1zReY3t8kTC-aZLZECzmXY2riiWV4sEBV 1Dbd7Wa6eg652Z4gTh5cSifL9_8WhYK5_
19jeSNCHapBkMX5JxRcvWmSrkbFiLLi7c 1_RtUw2iWDluNfLvDq3ym4uSTHx8xOOxx 1Q_FA0zGAnzeuLWGzY4XnKyIj0g2F0Bx2
1hL72w_R4IGcgU7Np6_kj4itle5N8KFT6 1aVxTHMvwiT2z7RX5hhxg-zfc_lNiXRXK 1Np1hZlgv4VhwidlcFO_I6H9OtYxj8y8P
1r6e6BsXS8iefbno_Nh0VukODaxyi45lO 1HUzbVwZObhUbxiw1vZXwfUm9BpoKsVPF 14qkjislfLVNLbYXqMMXwzBNTIPGj-jJu
1c3jGbPZ6X_jMWbqwzpkIk8ij3i-53Jyo 1RF-ZO641s5XHqfdti5JZY9U0yigLvBNF 1QkY7p-kxci9cc5yK9EByOENcjFMJH7Dm
1XxaNnfW2q06xa6kbn3IDa2wQ04xYv0FS 1q23qaynNHBdVaRqmn-3rUll9dG53Ifmp 1FghWSwdKPNDHdpCm1tsAztJo3BehjseT
1fPrjcSUMIfpOnR5jZ-LK-DaBqpckgsk9 1Kr7BSVAOwPf8zYRSxzgW3LLuvDjVeArn 1CaX2Xz4SR_znnzHxzeGrrbDPgoFlDTLV
1WZmJ6GS2KdLrbCHWezPCbzr2yypy9Qoq 1COdgBKSkvK37OksP0QIQcQO84hm4nOi- 1b-ERee1j6eb1JLPbpey1b3UK7EZrtocC
1hcYIasXcRqhiIOprdshkmE3-VallEsOu 11bF-0NRoe_X4pei8t1UaAP9zuPYyXM9O 1zl1YS_LYtmroI7xntHWBKHvVIqBMtYOl
1zvGufbh8_j1ylkm3GbC0GNTEN7I0ejZL 1H4kzeIcUbgVpSmXyN1bwhX2LUUJ7rH0k 1HF8FN67uB676p2PLkSyasAjbCJMtF2zM
1AmVuOx9_lnzNitlhWY0rd_n70CjEv_ul 1MQd_ofEFmD8P8wl73ip_hS2hvjj9SnKI 11b29CFpop6OkKroG5sB0WkRpVJXQpiNP
1SVqY1EpwxnZ3hQ5M_ohsaSmsFkwbV2gh 1-uk5CQ57aj52QfAtBIkVRo4gU3cJ26cm 1EdMFy0vzWjKRZSoxWDNX7yNNFPVMIIKK
1uJskk630G8qCm3zR0PNbsF57A-i82pLu 1lSF-CCV-XU1TGVk95kkRORn7cJtG2Wnc 1JQoM-5TDgZu0nGWe5pdTn9RXF_1KFQGz
1auTgAR0ylwd30X4ykn5f3x7_EMF53owz 1FkrFYa76CzRWkfRCXTTnvmzJxfIpPfVy 1QdAUN-XIt1J1M2PZxGzUe2sCYUxNwG-T
1tJYsWPiL_o-4W8yIO6Q00ZWE0niMsmcW 1JTib3sOedXmH6j3nX5r3-OY5djymv4RS 1odeumrDMGSWlnJqe1dPn3g98n3o4xbbV
1OI9msPC-1khfuz4Lv9ud8XuVhHasheBV 16-mtZYnh45V8DjIxK_Fjr9LXwtMSg7Ni
"""
"""Drive ids of the parts 1 to 113, in order."""

RELEASED: Final = (
    *_WHOLE,
    *(
        ReleasedFile(
            name=f"bioscan_images_cropped_full_part{first}-{last}.zip",
            group="cropped_full",
            licence=LICENCE,
            mirrors={"drive": _drive(file_id)},
            parts=(first, last),
        )
        for (first, last), file_id in _CROPPED_FULL.items()
    ),
    *(
        ReleasedFile(
            name=f"bioscan_images_original_full_part{part}.zip",
            group="original_full",
            licence=LICENCE,
            mirrors={"drive": _drive(file_id)},
            parts=(part, part),
        )
        for part, file_id in enumerate(_ORIGINAL_FULL.split(), start=1)
    ),
)
"""Every released file."""

ONE_COPY: Final = {
    "metadata": "BIOSCAN_Insect_Dataset_metadata.tsv",
    "cropped_256": "cropped_256.zip",
    "original_256": "original_256.zip",
}
"""Group released in two forms -> the one that its name stands for: that with a published checksum."""

GROUPS: Final = tuple(dict.fromkeys(file.group for file in RELEASED))


def released(names: Iterable[str] = ()) -> tuple[ReleasedFile, ...]:
    """The released files that names stand for, each once, in the order of the names; all without names.

    A name is a file name; a group (`cropped_256`: one copy of it); a group with the numbers of part folders
    (`original_full:1-20,113`), for the archives that hold them; or a pattern of file names (`cropped_256.*`).

    Raises:
        RequestError: a name that stands for nothing, with the nearest one.

    >>> [file.name for file in released(["metadata", "cropped_full:7"])]
    ['BIOSCAN_Insect_Dataset_metadata.tsv', 'bioscan_images_cropped_full_part1-20.zip']
    """
    chosen = [_named(name) for name in names]
    return tuple({file.name: file for files in chosen for file in files}.values()) if chosen else RELEASED


def _named(name: str) -> list[ReleasedFile]:
    group, colon, numbers = name.partition(":")
    if colon:
        return _parts(group, numbers)
    if name in GROUPS:
        copies = [file for file in RELEASED if file.group == name]
        return [file for file in copies if file.name == ONE_COPY.get(name, file.name)]
    found = [file for file in RELEASED if fnmatchcase(file.name, name)]
    if not found:
        hint = near(name, [*GROUPS, *(file.name for file in RELEASED)])
        raise RequestError(f"no released file or group '{name}'{hint} (groups: {', '.join(GROUPS)})")
    return found


def _parts(group: str, numbers: str) -> list[ReleasedFile]:
    files = [file for file in RELEASED if file.group == group and file.parts]
    if not files:
        raise unknown("group of part folders", group, {file.group for file in RELEASED if file.parts})
    found: list[ReleasedFile] = []
    for text in numbers.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip(), flags=re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= _PARTS:
            raise RequestError(f"{group}:{numbers}: '{text}' is no part number and no span (1-{_PARTS})")
        found += [file for file in files if file.parts and file.parts[0] <= last and file.parts[1] >= first]
    return found
