package edgellama.core

import org.junit.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertNotNull
import kotlin.test.assertTrue

/** Answers every token with the next id, and keeps what it was fed. */
private class CountingModel(override val contextLength: Int = 64) : LogitsModel {
    override val vocabSize = 512
    override val runtime = "counting"
    val fed = ArrayList<List<Int>>()
    val cache = ArrayList<Int>()

    override fun forward(tokens: IntArray, position: Int): FloatArray {
        check(position <= cache.size && position + tokens.size <= contextLength)
        fed.add(tokens.toList())
        while (cache.size > position) cache.removeAt(cache.size - 1)
        cache.addAll(tokens.toList())
        return FloatArray(vocabSize).also { it[(tokens.last() + 1) % vocabSize] = 9f }
    }

    override fun close() = Unit
}

class GeneratorTest {
    private val tokenizer = Vectors.tokenizer("smollm2")
    private val model = CountingModel()
    private val session = Session(model)

    private fun generator(vararg stop: Int, clock: Clock = Clock.SYSTEM) =
        Generator(session, tokenizer, stop.toSet(), clock)

    @Test
    fun endsAtAStopTokenWhichIsNoText() {
        val text = StringBuilder()
        val found = generator(44).generate(intArrayOf(40), Sampler(), 20) { piece, _ -> text.append(piece) }
        assertEquals(listOf(41, 42, 43, 44), found.ids.toList())
        assertEquals(Finish.STOP, found.finish)
        assertEquals(tokenizer.decode(intArrayOf(41, 42, 43)), text.toString())
        assertEquals(listOf(40, 41, 42, 43), model.cache)
    }

    @Test
    fun endsAtTheLimitAndAtTheEndOfTheContext() {
        assertEquals(Finish.LENGTH, generator().generate(intArrayOf(40), Sampler(), 3) { _, _ -> }.finish)
        val found = generator().generate(IntArray(60) { 40 + it }, Sampler(), 100) { _, _ -> }
        assertEquals(Finish.CONTEXT, found.finish)
        assertEquals(5, found.ids.size) // four that fit, and one that follows the last
        assertFailsWith<ContextException> { generator().generate(IntArray(65) { 1 }, Sampler(), 1) { _, _ -> } }
    }

    @Test
    fun stopsWhenAsked() {
        var count = 0
        val found = generator().generate(intArrayOf(40), Sampler(), 50, { count >= 3 }) { _, tokens -> count = tokens }
        assertEquals(Finish.STOPPED, found.finish)
        assertTrue(found.ids.size in 3..4)
        val none = generator().generate(intArrayOf(40, 50), Sampler(), 50, { true }) { _, _ -> }
        assertEquals(Finish.STOPPED to 0, none.finish to none.ids.size, "stopped before the prompt was fed")
    }

    @Test
    fun theCacheGoesOnWhereTheTextDoes() {
        val first = generator().generate(intArrayOf(10, 11, 12), Sampler(), 3) { _, _ -> } // 13, 14, 15
        model.fed.clear()
        val next = generator().generate(intArrayOf(10, 11, 12, 13, 14, 15, 30, 31), Sampler(), 1) { _, _ -> }
        assertEquals(listOf(listOf(15, 30, 31)), model.fed, "the last token was never fed")
        assertEquals(5, next.stats.cachedTokens)
        assertEquals(0, first.stats.cachedTokens)
        model.fed.clear()
        generator().generate(intArrayOf(10, 99, 12), Sampler(), 1) { _, _ -> }
        assertEquals(listOf(listOf(10, 99, 12)), model.fed, "another text starts over")
    }

    @Test
    fun theSamePromptAgainGivesTheSame() {
        val ids = List(2) { generator().generate(intArrayOf(40, 41), Sampler(), 4) { _, _ -> }.ids.toList() }
        assertEquals(ids[0], ids[1])
    }

    @Test
    fun measuresPrefillAndDecode() {
        var now = 0L
        val clock = Clock { now += 1_000_000; now }
        val stats = generator(clock = clock).generate(intArrayOf(1, 2, 3), Sampler(), 4) { _, _ -> }.stats
        assertEquals(3, stats.promptTokens)
        assertEquals(4, stats.generatedTokens)
        assertEquals(3 * 1e9 / 1_000_000, assertNotNull(stats.prefillRate))
        assertTrue(stats.firstTokenMillis > 0 && assertNotNull(stats.decodeRate) > 0)
    }

    @Test
    fun benchmarksGiveMedianAndRange() {
        var now = 0L
        val clock = Clock { now += 1_000_000; now }
        var runs = 0
        val plan = BenchmarkPlan(promptTokens = 8, decodeTokens = 4, warmUps = 1, runs = 3)
        val result = assertNotNull(Benchmark(model, "xnnpack", clock).run(plan, intArrayOf(5, 6, 7), onRun = { runs = it }))
        assertEquals(4, runs)
        assertEquals(8 * 1e9 / 1_000_000, result.prefillRate.median)
        val json = result.toJson(Vectors.bundle(), Device("d", "o"), 1.0, mapOf("thermal" to "none"))
        assertEquals(8, JsonObject.parse(json, "benchmark").int("prompt_tokens"))
        assertEquals(2.5, Figure(listOf(4.0, 1.0, 2.0, 3.0)).median)
        assertFailsWith<ContextException> { Benchmark(model, "xnnpack").run(BenchmarkPlan(60, 60), intArrayOf(1)) }
    }
}
