package edgellama.core

import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder
import java.io.File
import kotlin.math.abs
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertNull
import kotlin.test.assertTrue

/** Says at the n-th scored position what tests/make_vectors.py describes. */
internal class VectorModel(private val scale: Double, override val vocabSize: Int, var position: Int = 0) : LogitsModel {
    override val contextLength = 1024
    override val runtime = "vectors"
    val calls = ArrayList<Pair<Int, Int>>()

    override fun forward(tokens: IntArray, position: Int): FloatArray {
        calls.add(position to tokens.size)
        val values = Random(1000L + this.position++)
        val base = DoubleArray(vocabSize) { 12 * values.uniform() - 6 }
        val noise = DoubleArray(vocabSize) { values.uniform() - 0.5 }
        return FloatArray(vocabSize) { (base[it] + scale * noise[it]).toFloat() }
    }

    override fun close() = Unit
}

class GoldenCheckTest {
    @get:Rule
    val folder = TemporaryFolder()

    private companion object {
        const val HOST = "x86-64" // the kind of processor that the vectors' first rows belong to
    }

    private val json = Vectors.json("golden.json")
    private val bundle = Vectors.bundle()
    private val target = json.string("target")

    private fun run(scale: Double, of: Bundle = bundle, kind: String = HOST): GoldenResult =
        GoldenCheck(of, target, kind).run(VectorModel(scale, json.int("vocab_size")), of.tokenizer())!!

    @Test
    fun comesToPythonsNumbersAndVerdicts() {
        val cases = json.objects("cases")
        assertEquals(setOf("pass", "fail"), cases.map { it.string("verdict") }.toSet())
        for (case in cases) {
            val found = run(case.double("scale"), kind = case.string("processor"))
            assertEquals(case.stringOrNull("family"), found.family, case.string("name"))
            assertEquals(case.string("verdict") == "pass", found.passed, case.string("name"))
            close(case.double("kl_mean"), found.klMean)
            close(case.double("parity_kl_mean"), found.parityKlMean)
            assertEquals(case.double("top1_agreement"), found.top1, 1e-12)
            assertEquals(case.double("parity_top1_agreement"), found.parityTop1, 1e-12)
            for ((expected, sequence) in case.objects("sequences").zip(found.sequences)) {
                assertEquals(expected.string("name"), sequence.name)
                assertTrue(sequence.tokensMatch, sequence.name)
                expected.doubles("kl").zip(sequence.kl.toList()).forEach { (e, f) -> close(e, f) }
                expected.doubles("parity_kl").zip(sequence.parityKl.toList()).forEach { (e, f) -> close(e, f) }
                assertEquals(expected.list("top1"), sequence.top1.toList())
                assertEquals(expected.list("parity_top1"), sequence.parityTop1.toList())
            }
        }
    }

    private fun close(expected: Double, found: Double) =
        assertTrue(abs(expected - found) <= 1e-9 + 1e-6 * expected, "expected $expected, found $found")

    @Test
    fun feedsPrefillThenSingleTokens() {
        val model = VectorModel(0.0, 512)
        GoldenCheck(bundle, target, HOST).run(model, bundle.tokenizer())
        for (sequence in Golden.read(bundle).sequences) {
            assertEquals(0 to sequence.scoreFrom + 1, model.calls.removeAt(0))
            for (i in sequence.scoreFrom + 1 until sequence.tokens.size) assertEquals(i to 1, model.calls.removeAt(0))
        }
        assertTrue(model.calls.isEmpty())
    }

    @Test
    fun theLogHoldsEverything() {
        val result = run(0.02)
        assertEquals("per-block", result.family)
        val log = JsonObject.parse(result.toJson(Device("Maker Model", "Android 15"), 12.5, 1000), "log")
        assertEquals(GoldenResult.SCHEMA, log.string("schema"))
        assertEquals(json.string("artifact_sha256"), log.string("artifact_sha256"))
        assertEquals(json.string("golden_sha256"), log.string("golden_sha256"))
        assertEquals("pass", log.string("verdict"))
        assertEquals("per-block", log.string("family"))
        assertEquals(result.sequences.size, log.objects("sequences").size)
        assertEquals(1000L, log.long("peak_bytes"))
        assertEquals(listOf("artifact", "tokenizer", "parity_kl", "parity_kl_sequence"), log.objects("checks").map { it.string("name") })
    }

    @Test
    fun whatIsNoNumberFails() {
        for (bad in listOf(Float.NaN, Float.POSITIVE_INFINITY, Float.NEGATIVE_INFINITY)) {
            val inner = VectorModel(0.0, 512)
            val model = object : LogitsModel by inner {
                override fun forward(tokens: IntArray, position: Int) = inner.forward(tokens, position).also {
                    if (inner.position == 3) it[Sampler.best(it)] = bad
                }
            }
            val result = GoldenCheck(bundle, target, HOST).run(model, bundle.tokenizer())!!
            assertEquals(false, result.passed, "$bad")
            val log = JsonObject.parse(result.toJson(Device("d", "o"), null, null), "log")
            assertEquals("fail", log.string("verdict"))
        }
    }

    @Test
    fun anotherTokenizerFails() {
        val file = File(Vectors.directory, "bundle/tokenizer/tokenizer.json").readText()
        val other = Tokenizer.parse(file.replace("\"individual_digits\": true", "\"individual_digits\": true")
            .replaceFirst(Regex("\"merges\": \\[\\s*(\\[[^]]*],?|\"[^\"]*\",?)"), "\"merges\": ["))
        val result = GoldenCheck(bundle, target, HOST).run(VectorModel(0.0, 512), other)!!
        assertEquals(listOf("tokenizer"), result.checks.filter { !it.passed }.map { it.name })
    }

    @Test
    fun canBeStopped() {
        var asked = 0
        assertNull(GoldenCheck(bundle, target, HOST).run(VectorModel(0.0, 512), bundle.tokenizer(), { ++asked > 5 }))
    }

    @Test
    fun damagedVectorsAreRefused() {
        val directory = folder.newFolder().also { File(Vectors.directory, "bundle").copyRecursively(it, true) }
        File(directory, "golden/xnnpack.ids.bin").let { it.writeBytes(it.readBytes().also { b -> b[0]++ }) }
        assertFailsWith<BundleException> { run(0.0, Bundle.open(directory)) }
        File(directory, "golden/golden.json").writeText("{}")
        assertFailsWith<BundleException> { run(0.0, Bundle.open(directory)) }
    }
}
