package edgellama.core

import org.junit.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

class ChatFormatTest {
    private val json = Vectors.json("chat.json")
    private val formats = json.objectOf("formats").entries().mapValues { ChatFormat.of(it.value) }

    @Test
    fun rendersAsPython() {
        val cases = json.objects("cases")
        assertTrue(cases.size > 100)
        for (case in cases) {
            val format = formats.getValue(case.string("format"))
            val found = format.render(Vectors.messages(case), case.boolean("add_generation_prompt"))
            assertEquals(case.string("text"), found)
        }
    }

    @Test
    fun refusesOtherOrdersOfRoles() {
        for (case in json.objects("refused")) {
            val format = formats.getValue(case.string("format"))
            assertFailsWith<TokenizerException> {
                format.render(Vectors.messages(case), case.boolean("add_generation_prompt"))
            }
        }
    }

    @Test
    fun aConversationGrowsTurnByTurn() {
        val tokenizer = Vectors.tokenizer("smollm2")
        val format = formats.getValue("smollm2")
        val chat = Chat(format, tokenizer, "Be brief.")
        val first = chat.ask("Hi")
        chat.answered("Hello!")
        val second = chat.ask("Bye")
        val expected = format.render(
            listOf(
                Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "Hi"), Message(Role.ASSISTANT, "Hello!"),
                Message(Role.USER, "Bye"),
            ),
            addGenerationPrompt = true,
        )
        assertEquals(tokenizer.encode(expected, addSpecialTokens = false).toList(), second.toList())
        assertEquals(first.toList(), second.take(first.size))
        chat.withdraw()
        assertEquals(3, chat.messages.size)
        assertEquals(0, Chat(format, tokenizer, " ").messages.size, "a blank system message is none")
    }
}
