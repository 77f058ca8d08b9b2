package edgellama.core

/** GPT-2's table: the printable character that stands for each byte in a byte-level vocabulary. */
internal object ByteLevel {
    val character = CharArray(256)
    private val byte = HashMap<Char, Int>()

    init {
        var others = 0
        for (b in 0..255) {
            val printable = b in 0x21..0x7e || b in 0xa1..0xac || b in 0xae..0xff
            character[b] = if (printable) b.toChar() else (0x100 + others++).toChar()
            byte[character[b]] = b
        }
    }

    /** The bytes of a piece of the vocabulary; of a piece with any other character, its own text in UTF-8. */
    fun bytesOf(piece: String): ByteArray {
        val bytes = ByteArray(piece.length)
        for (i in piece.indices) bytes[i] = (byte[piece[i]] ?: return piece.toByteArray(Charsets.UTF_8)).toByte()
        return bytes
    }
}
