import EdgeLlamaCore
import Foundation
import Observation

/// What a person can set for a chat.
struct ChatSettings: Equatable, Sendable {
    var system: String = ""
    var temperature: Double = 0.7
    var topP: Double = 0.95
    var seed: UInt64 = 0
    var maxTokens: Int = 256
}

/// One message on the screen.
struct ChatLine: Identifiable, Sendable {
    let id: Int
    let isUser: Bool
    var text: String
}

/// A chat: streams answers, and goes on in the same KV cache.
@MainActor
@Observable
final class ChatScreen {
    let directory: URL
    let backend: Backend
    private(set) var lines: [ChatLine] = []
    private(set) var status: String = ""
    private(set) var error: String?
    private(set) var isBusy: Bool = false
    private(set) var usedContext: Int = 0
    private(set) var contextLength: Int = 1
    private(set) var settings: ChatSettings = ChatSettings()
    private var chat: Chat?
    private var task: Task<Void, Never>?

    init(directory: URL, backend: Backend) {
        self.directory = directory
        self.backend = backend
    }

    /// Another system prompt is another conversation.
    func apply(_ new: ChatSettings) {
        let startsOver: Bool = new.system != settings.system
        settings = new
        if startsOver { clear() }
    }

    func clear() {
        stop()
        lines = []
        chat = nil
        usedContext = 0
        status = ""
        error = nil
    }

    func stop() {
        task?.cancel()
    }

    func send(_ text: String) {
        if isBusy || text.isEmpty { return }
        isBusy = true
        task = Task { await answer(text) }
    }

    private func answer(_ text: String) async {
        error = nil
        Phone.keepAwake(true)
        defer {
            isBusy = false
            Phone.keepAwake(false)
        }
        lines.append(ChatLine(id: lines.count, isUser: true, text: text))
        var place: Int = lines.count
        lines.append(ChatLine(id: place, isUser: false, text: ""))
        var answer: String = ""
        do {
            let loaded: Loaded = try await Models.shared.load(directory, backend) { self.status = $0 }
            contextLength = loaded.bundle.contextLength
            guard let format: ChatFormat = loaded.bundle.chatFormat else {
                throw EdgeLlamaError(
                    .tokenizer, "this model has no chat (\(loaded.bundle.noChatReason ?? "no template"))",
                    remedy: "Benchmark and accuracy check work with it; a chat needs an instruction-tuned model."
                )
            }
            let sampler: Sampler = try Sampler(
                temperature: settings.temperature, topP: settings.topP, seed: settings.seed
            )
            var chat: Chat = self.chat ?? Chat(
                format: format, tokenizer: loaded.tokenizer, contextLength: loaded.bundle.contextLength,
                system: settings.system
            )
            let forgot: Bool = chat.forgets
            let prompt: [Int] = try chat.ask(text, answerTokens: settings.maxTokens)
            if chat.forgets, !forgot, lines.count == place + 1 {
                lines[place].text = ChatScreen.forgets
                place = lines.count
                lines.append(ChatLine(id: place, isUser: false, text: ""))
            }
            let generator: Generator = Generator(
                session: loaded.session, tokenizer: loaded.tokenizer, stopIds: loaded.bundle.stopIds
            )
            status = "Reading \(prompt.count) tokens…"
            let events: AsyncThrowingStream<GenerationEvent, any Error> = generator.stream(
                prompt, sampler: sampler, maxTokens: settings.maxTokens, on: Models.shared.worker
            )
            for try await event in events {
                switch event {
                case .text(let piece, let count):
                    answer += piece
                    show(answer, at: place)
                    usedContext = prompt.count + count
                case .finished(let found):
                    status = ChatScreen.text(found, loaded)
                }
            }
            if Task.isCancelled { status = "Stopped." }
            // What was cut short is part of the conversation too; what never began is not.
            if answer.isEmpty { chat.withdraw() } else { chat.answered(answer) }
            if lines.indices.contains(place) { self.chat = chat }
        } catch {
            self.error = sentence(error)
            status = ""
        }
        if answer.isEmpty, lines.count == place + 1 { lines.removeLast() }
    }

    /// A chat that was cleared has no such line any more.
    private func show(_ answer: String, at place: Int) {
        if lines.indices.contains(place) { lines[place].text = answer }
    }

    private static let forgets: String = "[the context is full: the oldest turns are left out from now on]"

    private static func text(_ found: Generated, _ loaded: Loaded) -> String {
        let stats: Stats = found.stats
        let first: String = String(format: "first token %.0f ms", stats.firstTokenMillis)
        let load: String = String(format: "load %.0f ms", loaded.loadMillis)
        return "\(stats.generatedTokens) tokens (\(found.finish.rawValue)), prefill \(perSecond(stats.prefillRate)), "
            + "decode \(perSecond(stats.decodeRate)), \(first), \(load), memory \(megabytes(Phone.usedBytes)), "
            + "thermal state \(Phone.thermalState)"
    }
}
