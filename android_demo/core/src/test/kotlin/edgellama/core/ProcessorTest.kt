package edgellama.core

import org.junit.Test
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertNotNull
import kotlin.test.assertNull

class ProcessorTest {
    @Test
    fun aCoreOfArmv80IsNamed() {
        val old = Processor.of(cores(CORTEX_A53, CORTEX_A53))
        assertEquals(Processor(arm = true, atomics = false, dotProduct = false), old)
        assertContains(assertNotNull(old.warning), "Armv8.0")
    }

    @Test
    fun oneOldCoreIsEnough() {
        assertEquals(false, Processor.of(cores(CORTEX_A76, CORTEX_A53)).atomics)
        assertEquals(false, Processor.of(cores(CORTEX_A53, CORTEX_A76)).atomics)
    }

    @Test
    fun aRecentProcessorNeedsNoWarning() {
        val recent = Processor.of(cores(CORTEX_A76, CORTEX_A76))
        assertEquals(Processor(arm = true, atomics = true, dotProduct = true), recent)
        assertNull(recent.warning)
    }

    @Test
    fun aProcessorWithoutDotProductsIsSlow() {
        assertContains(assertNotNull(Processor.of(cores(CORTEX_A75_OF_2017)).warning), "slowly")
    }

    @Test
    fun otherProcessorsAndTextsAreNotArm() {
        val texts = listOf("", "Features\t: half thumb fastmult vfp edsp neon\n", "flags\t\t: fpu vme atomics\n", "Features")
        for (text in texts) {
            assertEquals(Processor(arm = false, atomics = false, dotProduct = false), Processor.of(text), text)
            assertNull(Processor.of(text).warning)
        }
    }

    @Test
    fun theKindDecidesBetweenGoldenVectors() {
        assertEquals("arm64-dotprod", Processor.of(cores(CORTEX_A76)).kind)
        assertEquals("arm64", Processor.of(cores(CORTEX_A76, CORTEX_A75_OF_2017)).kind)
        assertEquals("x86-64", Processor.of("flags\t\t: fpu vme\n").kind)
    }

    private fun cores(vararg features: String) = features.withIndex().joinToString("\n") { (number, line) ->
        "processor\t: $number\nBogoMIPS\t: 38.40\nFeatures\t: $line\nCPU implementer\t: 0x41\n"
    }

    private companion object {
        const val CORTEX_A53 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
        const val CORTEX_A75_OF_2017 = "$CORTEX_A53 atomics fphp asimdhp asimdrdm lrcpc dcpop"
        const val CORTEX_A76 = "$CORTEX_A75_OF_2017 asimddp"
    }
}
