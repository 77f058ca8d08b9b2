import EdgeLlamaCore
import SwiftUI

struct ChatView: View {
    @State private var screen: ChatScreen
    @State private var input: String = ""
    @State private var showsSettings: Bool = false

    init(screen: ChatScreen) {
        _screen = State(initialValue: screen)
    }

    var body: some View {
        VStack(spacing: 0) {
            messages
            footer
        }
        .navigationTitle("Chat")
        .navigationBarTitleDisplayMode(.inline)
        .toolbar {
            Button("Clear the chat", systemImage: "trash") { screen.clear() }
            Button("Settings", systemImage: "slider.horizontal.3") { showsSettings = true }
        }
        .sheet(isPresented: $showsSettings) {
            SettingsView(settings: screen.settings) { (new: ChatSettings) in screen.apply(new) }
        }
        .onDisappear { screen.stop() }
    }

    private var messages: some View {
        ScrollView {
            LazyVStack(alignment: .leading, spacing: 12) {
                ForEach(screen.lines) { (line: ChatLine) in
                    Text(line.text)
                        .textSelection(.enabled)
                        .padding(10)
                        .background(line.isUser ? Color.accentColor.opacity(0.15) : Color.gray.opacity(0.12))
                        .clipShape(RoundedRectangle(cornerRadius: 12))
                        .frame(maxWidth: .infinity, alignment: line.isUser ? .trailing : .leading)
                        .accessibilityLabel((line.isUser ? "You: " : "Model: ") + line.text)
                }
            }
            .padding()
        }
        .defaultScrollAnchor(.bottom)
    }

    private var footer: some View {
        VStack(alignment: .leading, spacing: 6) {
            if let error: String = screen.error { ErrorText(error) }
            if !screen.status.isEmpty {
                Text(screen.status).font(.caption).foregroundStyle(.secondary).textSelection(.enabled)
            }
            ProgressView(value: min(Double(screen.usedContext), Double(screen.contextLength)), total: Double(screen.contextLength))
                .accessibilityLabel("Context")
                .accessibilityValue("\(screen.usedContext) of \(screen.contextLength) tokens")
            HStack {
                TextField("Message", text: $input, axis: .vertical)
                    .textFieldStyle(.roundedBorder)
                    .lineLimit(1...5)
                if screen.isBusy {
                    Button("Stop", systemImage: "stop.circle.fill") { screen.stop() }.labelStyle(.iconOnly)
                } else {
                    Button("Send", systemImage: "arrow.up.circle.fill") { send() }
                        .labelStyle(.iconOnly)
                        .disabled(input.isEmpty)
                }
            }
            .font(.title2)
        }
        .padding()
        .background(.bar)
    }

    private func send() {
        screen.send(input)
        input = ""
    }
}
