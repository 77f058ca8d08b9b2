package edgellama.core

/**
 * UTF-8 that arrives in pieces: a character that is not complete waits for its other bytes. Each longest run of bytes
 * that begins a character and cannot be continued becomes one U+FFFD (Unicode 15, section 3.9), as in Python.
 */
internal class Utf8Decoder {
    private var point = 0
    private var missing = 0
    private var low = 0x80
    private var high = 0xbf

    fun push(bytes: ByteArray): String {
        val out = StringBuilder()
        for (byte in bytes) push(byte.toInt() and 0xff, out)
        return out.toString()
    }

    /** What was waiting: U+FFFD, or nothing. */
    fun flush(): String {
        val waiting = missing > 0
        missing = 0
        return if (waiting) REPLACEMENT else ""
    }

    private fun push(byte: Int, out: StringBuilder) {
        if (missing > 0) {
            if (byte in low..high) {
                point = (point shl 6) or (byte and 0x3f)
                low = 0x80
                high = 0xbf
                if (--missing == 0) out.appendCodePoint(point)
                return
            }
            missing = 0
            out.append(REPLACEMENT)
        }
        low = 0x80
        high = 0xbf
        when (byte) {
            in 0x00..0x7f -> out.append(byte.toChar())
            in 0xc2..0xdf -> start(byte and 0x1f, 1)
            in 0xe0..0xef -> {
                if (byte == 0xe0) low = 0xa0 // else it could be written shorter
                if (byte == 0xed) high = 0x9f // else it is a surrogate
                start(byte and 0x0f, 2)
            }
            in 0xf0..0xf4 -> {
                if (byte == 0xf0) low = 0x90
                if (byte == 0xf4) high = 0x8f
                start(byte and 0x07, 3)
            }
            else -> out.append(REPLACEMENT)
        }
    }

    private fun start(bits: Int, following: Int) {
        point = bits
        missing = following
    }

    private companion object {
        const val REPLACEMENT = "\ufffd"
    }
}
