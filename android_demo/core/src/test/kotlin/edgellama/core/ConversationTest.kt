package edgellama.core

import org.junit.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertFalse
import kotlin.test.assertTrue

class ConversationTest {
    private val formats = Vectors.json("chat.json").objectOf("formats").entries().mapValues { ChatFormat.of(it.value) }
    private val tokenizer = Vectors.tokenizer("smollm2")
    private val format = formats.getValue("smollm2")

    @Test
    fun encodesAndForgetsAsPython() {
        val cases = Vectors.json("conversation.json").objects("cases")
        assertTrue(cases.size > 20)
        for (case in cases) {
            val name = case.string("format")
            val conversation = Conversation(formats.getValue(name), Vectors.tokenizer(name))
            val messages = Vectors.messages(case)
            val prompt = conversation.prompt(messages, case.int("context_length"), case.int("answer_tokens"))
            if (case.isNull("ids")) {
                assertEquals(null, prompt)
            } else {
                assertEquals(case.ints("ids").toList(), prompt?.ids?.toList(), messages.toString())
                assertEquals(case.int("dropped"), prompt?.dropped)
            }
        }
    }

    @Test
    fun aConversationGrowsTurnByTurn() {
        val chat = Chat(format, tokenizer, 1000, "Be brief.")
        val first = chat.ask("Hi", 10)
        chat.answered("Hello!")
        val second = chat.ask("Bye", 10)
        val expected = format.render(
            listOf(
                Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "Hi"), Message(Role.ASSISTANT, "Hello!"),
                Message(Role.USER, "Bye"),
            ),
            addGenerationPrompt = true,
        )
        assertEquals(tokenizer.encode(expected, addSpecialTokens = false).toList(), second.toList())
        assertEquals(first.toList(), second.take(first.size))
        assertFalse(chat.forgets)
        chat.withdraw()
        assertEquals(3, chat.messages.size)
        assertEquals(0, Chat(format, tokenizer, 1000, " ").messages.size, "a blank system message is none")
    }

    @Test
    fun theOldestTurnsGoAndTheSystemMessageStays() {
        val system = Message(Role.SYSTEM, "Be brief.")
        val one = Conversation(format, tokenizer).encode(listOf(system, Message(Role.USER, "Number 1"))).size
        val chat = Chat(format, tokenizer, 3 * one, system.content)
        for (turn in 1..6) {
            assertTrue(chat.ask("Number $turn", 4).size <= 3 * one - 4)
            chat.answered("Yes.")
        }
        assertTrue(chat.forgets)
        assertEquals(system, chat.messages.first())
        assertTrue(chat.messages.size < 13)
        assertEquals("Number 6", chat.messages[chat.messages.size - 2].content)
        val before = chat.messages
        val error = assertFailsWith<ContextException> { chat.ask("long ".repeat(300), 4) }
        assertTrue("this turn has" in error.text, error.text)
        assertEquals(before, chat.messages, "a turn that does not fit changes nothing")
    }
}
