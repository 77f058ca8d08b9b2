package edgellama.core

import org.junit.Test
import java.io.File
import kotlin.math.abs
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertNotNull
import kotlin.test.assertNull
import kotlin.test.assertTrue

class ChallengeTest {
    private val json = Vectors.json("challenge.json")
    private val bundle = Vectors.bundle()
    private val text = Json.write(Json.parse(File(Vectors.directory, "challenge.json").readText()).let { (it as Map<*, *>)["challenge"] })
    private val challenge = parse(text)

    private fun parse(text: String): Challenge = Challenge.parse(text, "challenge.json", bundle, "xnnpack")

    private fun run(scale: Double): Response = ChallengeRun(bundle, challenge).run(VectorModel(scale, 512))!!

    @Test
    fun givesPythonsAnswers() {
        val cases = json.objects("cases")
        assertTrue(cases.size >= 2)
        for (case in cases) {
            val found = run(case.double("scale"))
            val expected = case.objects("sequences")
            assertEquals(expected.size, found.answers.size)
            for ((sequence, rows) in expected.zip(found.answers)) {
                val ids = sequence.list("ids")
                val logp = sequence.list("logp")
                val rest = sequence.doubles("rest")
                assertEquals(ids.size, rows.size)
                rows.forEachIndexed { i, row ->
                    assertEquals((ids[i] as List<*>).map { (it as Long).toInt() }, row.ids.toList())
                    (logp[i] as List<*>).zip(row.logp).forEach { (e, f) -> close((e as Number).toDouble(), f!!) }
                    close(rest[i], row.rest!!)
                }
            }
        }
    }

    private fun close(expected: Double, found: Double) =
        assertTrue(abs(expected - found) <= 1e-9 * (1 + abs(expected)), "expected $expected, found $found")

    @Test
    fun theResponseHoldsEverything() {
        val response = run(0.02)
        val log = JsonObject.parse(response.toJson(Device("Maker Model", "Android 15"), 12.5, 1000), "response")
        assertEquals("edgellama.response/1", log.string("schema"))
        assertEquals(challenge.nonce, log.string("nonce"))
        assertEquals("xnnpack", log.string("target"))
        assertEquals(bundle.artifactSha256("xnnpack"), log.string("artifact_sha256"))
        assertEquals("Maker Model", log.string("device"))
        assertEquals(challenge.sequences.map { it.name }, log.objects("sequences").map { it.string("name") })
        assertEquals(challenge.positions, log.objects("sequences").sumOf { it.list("ids").size })
        assertEquals(1000L, log.long("peak_bytes"))
        // Where tests/apps/test_android.py asks for it, to be judged by Python.
        System.getProperty("edgellama.response")?.let {
            File(it).writeText(response.toJson(Device("Maker Model", "Android 15"), 12.5, 1000))
        }
    }

    @Test
    fun feedsPrefillThenSingleTokens() {
        val model = VectorModel(0.0, 512)
        ChallengeRun(bundle, challenge).run(model)
        for (sequence in challenge.sequences) {
            assertEquals(0 to sequence.scoreFrom + 1, model.calls.removeAt(0))
            for (i in sequence.scoreFrom + 1 until sequence.tokens.size) assertEquals(i to 1, model.calls.removeAt(0))
        }
        assertTrue(model.calls.isEmpty())
    }

    @Test
    fun canBeStopped() {
        var asked = 0
        assertNull(ChallengeRun(bundle, challenge).run(VectorModel(0.0, 512), { ++asked > 5 }))
    }

    @Test
    fun brokenLogitsAreNulls() {
        for (bad in listOf(Float.NaN, Float.POSITIVE_INFINITY, Float.NEGATIVE_INFINITY)) {
            val found = TopTokens.of(floatArrayOf(1f, bad, 0f), 2)
            assertContentEquals(intArrayOf(0, 1), found.ids)
            assertEquals(listOf<Double?>(null, null), found.logp)
            assertNull(found.rest)
        }
    }

    @Test
    fun equalLogitsAreInTheOrderOfTheirIds() {
        val found = TopTokens.of(floatArrayOf(1f, 3f, 3f, 2f, -2000f), 3)
        assertContentEquals(intArrayOf(1, 2, 3), found.ids)
        assertNotNull(found.rest)
        assertNull(TopTokens.of(floatArrayOf(1f, 3f, -2000f), 2).rest, "zero has no logarithm")
    }

    @Test
    fun refusesWhatItCannotAnswer() {
        for ((old, new) in listOf(
            "edgellama.challenge/1" to "edgellama.challenge/2",
            "\"target\": \"xnnpack\"" to "\"target\": \"coreml\"",
            bundle.artifactSha256("xnnpack") to "0".repeat(64),
            "\"top_k\": 8" to "\"top_k\": 512",
            "\"score_from\": 0" to "\"score_from\": 400",
        )) {
            assertTrue(old in text, old)
            assertFailsWith<BundleException>(new) { parse(text.replaceFirst(old, new)) }
        }
        assertFailsWith<BundleException> { parse("[]") }
    }
}
