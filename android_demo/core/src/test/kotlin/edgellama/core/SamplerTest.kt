package edgellama.core

import org.junit.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

class SamplerTest {
    private val json = Vectors.json("sampling.json")

    @Test
    fun drawsAsPython() {
        for (case in json.objects("cases")) {
            val logits = case.doubles("logits").map { it.toFloat() }.toFloatArray()
            val seed = case.string("seed").toULong().toLong()
            val sampler = Sampler(case.double("temperature"), case.double("top_p"), seed)
            val found = List(case.ints("tokens").size) { sampler.sample(logits) }
            assertEquals(case.ints("tokens").toList(), found, "temperature ${case.double("temperature")}")
        }
    }

    @Test
    fun theGeneratorIsPythons() {
        for (case in json.objects("random")) {
            val seed = case.string("seed").toULong().toLong()
            val bits = Random(seed)
            for (expected in case.list("next")) assertEquals(expected, bits.next().toULong().toString())
            val uniform = Random(seed)
            for (expected in case.doubles("uniform")) assertEquals(expected, uniform.uniform())
        }
    }

    @Test
    fun negativeZeroIsZero() {
        assertEquals(0, Sampler(1.0, 1e-9).sample(floatArrayOf(0f, -0f, -1f)))
        assertEquals(0, Sampler(1.0, 1e-9).sample(floatArrayOf(-0f, 0f, -1f)))
    }

    @Test
    fun noNumbersAreAnErrorAndNoToken() {
        for (temperature in listOf(0.0, 1.0)) {
            assertFailsWith<ModelException> { Sampler(temperature).sample(floatArrayOf(1f, Float.NaN, 0f)) }
        }
    }

    @Test
    fun settingsWithoutAMeaningAreRefused() {
        for (temperature in listOf(-0.1, 101.0, Double.NaN)) {
            assertFailsWith<IllegalArgumentException> { Sampler(temperature) }
        }
        for (topP in listOf(0.0, 1.1, Double.NaN)) assertFailsWith<IllegalArgumentException> { Sampler(1.0, topP) }
    }
}
