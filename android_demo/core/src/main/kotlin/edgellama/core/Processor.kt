package edgellama.core

/**
 * What the kernel says about the processor's instructions, read before a library is loaded that could end the app.
 *
 * [arm]: the text describes a 64-bit Arm processor. [atomics]: all its cores have the atomic instructions of Armv8.1
 * (LSE). [dotProduct]: all its cores have the products of int8 that fast kernels are made of.
 */
data class Processor(val arm: Boolean, val atomics: Boolean, val dotProduct: Boolean) {
    /** A sentence for a person about a processor that is older than the libraries were tested on; else null. */
    val warning: String?
        get() = when {
            !arm || dotProduct -> null
            atomics -> "This processor has no int8 dot products; models run slowly on it."
            else ->
                "This processor is of Armv8.0: it has no atomic instructions and no int8 dot products. " +
                    "If the app ends while a model is loaded, ExecuTorch was built for newer processors."
        }

    /** The kind of processor, in the words of golden vectors (edgellama/targets/families.py). */
    val kind: String
        get() = when {
            !arm -> "x86-64"
            dotProduct -> "arm64-dotprod"
            else -> "arm64"
        }

    companion object {
        /** The kernel's description of the processor. */
        const val FILE = "/proc/cpuinfo"

        /** The processor of a text in the form of [FILE]. A text without Arm's features describes another processor. */
        fun of(cpuinfo: String): Processor {
            val cores = cpuinfo.lineSequence()
                .filter { it.substringBefore(':').trim() == "Features" }
                .map { it.substringAfter(':', "").trim().split(' ', '\t').toSet() }
                .filter { ASIMD in it }
                .toList()
            fun all(feature: String) = cores.isNotEmpty() && cores.all { feature in it }
            return Processor(cores.isNotEmpty(), all("atomics"), all("asimddp"))
        }

        private const val ASIMD = "asimd" // of every 64-bit Arm processor, and of no 32-bit one
    }
}
